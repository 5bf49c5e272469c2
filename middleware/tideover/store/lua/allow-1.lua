-- Takes the room of one call under its route's limits per minute, or says that none comes free soon enough.
-- KEYS: limiter (hash)
-- ARGV: requests per minute, tokens per minute (0: no limit), longest wait (ms), tokens of a call while none has told its own
-- Returns how long to wait (ms; -1: longer) and the tokens set aside. Not idempotent: a call whose reply is lost is counted.
local t = redis.call('time')
local now = t[1] + t[2] / 1000000
local known = redis.call('hmget', KEYS[1], 'requests', 'tokens', 'at', 'each')
local passed = math.max(0, now - tonumber(known[3] or now))
local each = tonumber(known[4] or ARGV[4])

local function left(had, per_minute)  -- what has come free since, of a second's worth at most
  local per_s = per_minute / 60
  local most = math.max(1, per_s)
  return math.min(most, tonumber(had or most) + passed * per_s)
end

local requests, tokens, wait = 0, 0, 0
if tonumber(ARGV[1]) > 0 then
  requests = left(known[1], ARGV[1])
  wait = math.max(wait, (1 - requests) * 60 / ARGV[1])
end
if tonumber(ARGV[2]) > 0 then
  tokens = math.max(left(known[2], ARGV[2]), -ARGV[2])  -- however much one took, others wait a minute at most
  wait = math.max(wait, -tokens * 60 / ARGV[2])
end
if wait * 1000 > tonumber(ARGV[3]) then return {-1, 0} end
each = math.floor(each + 0.5)
redis.call('hset', KEYS[1], 'requests', tostring(requests - 1), 'tokens', tostring(tokens - each))
redis.call('hset', KEYS[1], 'at', string.format('%.6f', now))
redis.call('expire', KEYS[1], 3600)
return {math.ceil(wait * 1000), each}

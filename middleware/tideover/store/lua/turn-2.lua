-- Takes a live call's turn in a recovering route's pace: it goes before every release, and borrows from what is to come.
-- KEYS: pace (hash), bucket (hash)
-- ARGV: rate while nobody has made one known (calls/s), longest wait (ms)
-- Returns how long to wait (ms), or -1: it would be longer. Not idempotent: a turn whose reply is lost is lost, too.
local t = redis.call('time')
local now = t[1] + t[2] / 1000000
local known = redis.call('hmget', KEYS[1], 'rate', 'quiet_until_ms')
local rate = tonumber(known[1] or ARGV[1])
if rate <= 0 then rate = tonumber(ARGV[1]) end  -- as it will be when the quiet is over
local bucket = redis.call('hmget', KEYS[2], 'tokens', 'at')
local tokens = math.max(tonumber(bucket[1] or '1'), -10 * rate)
tokens = math.min(tokens + math.max(0, now - tonumber(bucket[2] or now)) * rate, math.max(1, rate / 2))
local wait = math.max(tonumber(known[2] or '0') - now * 1000, math.max(0, 1 - tokens) / rate * 1000)
if wait > tonumber(ARGV[2]) then
  redis.call('hset', KEYS[1], 'refused_ms', string.format('%.0f', now * 1000))
  redis.call('expire', KEYS[1], 3600)
  return -1
end
redis.call('hset', KEYS[2], 'tokens', tostring(tokens - 1), 'at', string.format('%.6f', now))
redis.call('expire', KEYS[2], 3600)
return math.max(0, math.ceil(wait))

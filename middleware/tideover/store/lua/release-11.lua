-- Releases held jobs in the order given, each with a permit: ids go back to their queue, the bodies never left.
-- KEYS: held (zset), facts (hash), groups (hash), counts (hash), queue (list), marks (hash), msgs (hash), counters (hash),
--       breaker (hash), the breaker of its route (hash), bucket (hash)
-- ARGV: permit, generation of both breakers added up ('' any), rate (calls/s; '' all at once, to the head of the queue),
--       burst (calls), calls that a job makes, longest queue to leave (jobs), calls to borrow from what is to come, then the
--       members to release
-- Returns how many members it looked at, 1 if the queue had less room than the pace, and the facts (length of the id, id,
-- as packed) of those it released.
-- Atomic: token, permit and move are one step, so any number of processes may call it. A breaker that moved on releases
-- nothing. Idempotent: ZREM is the fence.
local t = redis.call('time')
local now = t[1] + t[2] / 1000000
if ARGV[2] ~= '' then
  local generation, fields = 0, {'state', 'generation', 'forced', 'forced_until_ms'}
  for _, b in ipairs({redis.call('hmget', KEYS[9], unpack(fields)), redis.call('hmget', KEYS[10], unpack(fields))}) do
    local state = b[1]
    if b[3] and now * 1000 < tonumber(b[4] or '0') then state = b[3] end
    if state == 'open' or state == 'half-open' then return {0, 0} end
    generation = generation + tonumber(b[2] or '0')
  end
  if string.format('%d', generation) ~= ARGV[2] then return {0, 0} end
end
local at_once, n, tokens, each, crowded = ARGV[3] == '', #ARGV - 7, 0, 0, 0
if not at_once then
  local bucket = redis.call('hmget', KEYS[11], 'tokens', 'at')
  tokens = math.max(tonumber(bucket[1] or '1'), -10 * tonumber(ARGV[3]))  -- live calls of a quicker time are forgiven
  tokens = tokens + math.max(0, now - tonumber(bucket[2] or now)) * tonumber(ARGV[3])
  tokens = math.min(tokens, tonumber(ARGV[4]))
  each = tonumber(ARGV[5])
  local usable = tokens + tonumber(ARGV[7])
  n = usable < math.min(each, tonumber(ARGV[4])) and 0 or math.max(1, math.floor(usable / each))
  local room = tonumber(ARGV[6]) - redis.call('llen', KEYS[5])
  if room < n then n, crowded = room, 1 end
end
local members, ids, seen = {}, {}, 0
for i = 8, #ARGV do
  if #members >= n then break end
  seen = seen + 1
  if redis.call('zrem', KEYS[1], ARGV[i]) == 1 then
    members[#members + 1], ids[#ids + 1] = ARGV[i], ARGV[i]:sub(13)
  end
end
if #members == 0 then return {seen, crowded} end
local function text(id)
  if #id ~= 16 then return (id:gsub('%z+$', '')) end
  return string.format('%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x', id:byte(1, 16))
end
local function number(bytes, first, last)
  local n = 0
  for i = first, last do n = n * 256 + bytes:byte(i) end
  return n
end
local facts, lost, out, go, marks = redis.call('hmget', KEYS[2], unpack(ids)), {}, {}, {}, {}
redis.call('hdel', KEYS[2], unpack(ids))
for j = 1, #members do
  local group, redis_id, known = members[j]:sub(1, 6), text(ids[j]), facts[j] or members[j]:sub(1, 12) .. string.rep('\0', 31)
  lost[group] = (lost[group] or 0) + 1
  out[j] = string.char(math.floor(#ids[j] / 256), #ids[j] % 256) .. ids[j] .. known
  if redis.call('hexists', KEYS[7], redis_id) == 1 then
    local held_ms, before_ms = number(known, 13, 18), number(known, 31, 36)
    local holds, deaths = 0, 0  -- a human who releases at once begins the count anew
    if not at_once then holds, deaths = number(known, 37, 38), number(known, 43, 43) end
    local total_ms = before_ms + math.max(0, math.floor(now * 1000) - held_ms)
    go[#go + 1], marks[#marks + 1] = redis_id, redis_id
    marks[#marks + 1] = string.format('%s\t%d\t%.0f\t%d\t', ARGV[1], holds, total_ms, deaths)
  end
end
for group, fewer in pairs(lost) do
  if redis.call('hincrby', KEYS[4], group, -fewer) <= 0 then
    redis.call('hdel', KEYS[4], group)
    redis.call('hdel', KEYS[3], group)
  end
end
if #go > 0 then redis.call('hset', KEYS[6], unpack(marks)) end
if at_once then
  for i = #go, 1, -1 do redis.call('lpush', KEYS[5], go[i]) end
elseif #go > 0 then
  redis.call('rpush', KEYS[5], unpack(go))
end
redis.call('hincrby', KEYS[8], 'releases', #out)
if not at_once then
  redis.call('hset', KEYS[11], 'tokens', tostring(tokens - each * #out), 'at', string.format('%.6f', now))
  redis.call('expire', KEYS[11], 3600)
end
return {seen, crowded, unpack(out)}

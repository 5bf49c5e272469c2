-- Changes a breaker, if it still is where the caller saw it.
-- KEYS: breaker (hash), failing (zset), counters (hash), breakers (set)
-- ARGV: key, state, generation, era and fence as seen, counter to raise ('' none), news channel, number of instants, then pairs
--       of instants (field, ms from now), then pairs of other fields and values
-- Returns 1 changed; 0 somebody was faster, or (counter probings) still has the leave to probe.
-- Idempotent: what was seen is the fence; every change moves one of them.
local seen = redis.call('hmget', KEYS[1], 'state', 'generation', 'era', 'fence', 'probing_until_ms')
if (seen[1] or 'closed') ~= ARGV[2] or (seen[2] or '0') ~= ARGV[3] then return 0 end
if (seen[3] or '0') ~= ARGV[4] or (seen[4] or '0') ~= ARGV[5] then return 0 end
redis.call('zrem', KEYS[2], '')  -- nothing; but a full Redis lets a script write that began by taking away
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if ARGV[6] == 'probings' and tonumber(seen[5] or '0') > now then return 0 end  -- by Redis' clock, whatever the caller's says
local last = 8 + 2 * tonumber(ARGV[8])
local set = {}
for i = 9, #ARGV, 2 do
  local value = ARGV[i + 1]
  if i < last then value = string.format('%.0f', now + tonumber(value)) end
  set[#set + 1], set[#set + 2] = ARGV[i], value
end
redis.call('hset', KEYS[1], unpack(set))
redis.call('hincrby', KEYS[1], 'version', 1)
redis.call('sadd', KEYS[4], ARGV[1])
if redis.call('hget', KEYS[1], 'era') ~= ARGV[4] then redis.call('del', KEYS[2]) end
if ARGV[6] ~= '' then redis.call('hincrby', KEYS[3], ARGV[6], 1) end
redis.call('publish', ARGV[7], ARGV[1])
return 1

-- Moves a breaker, if it still is where the caller saw it.
-- KEYS: breaker (hash), window (hash), counters (hash)
-- ARGV: key, state and generation as seen, new state, new generation, why, news channel
-- Returns 1 moved; 0 somebody was faster.
-- Idempotent: state and generation are the fence.
local seen = redis.call('hmget', KEYS[1], 'state', 'generation')
if (seen[1] or 'closed') ~= ARGV[2] or (seen[2] or '0') ~= ARGV[3] then return 0 end
redis.call('del', KEYS[2])  -- first, because a full Redis lets a script write that began by taking away
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('hset', KEYS[1], 'state', ARGV[4], 'generation', ARGV[5], 'since_ms', now, 'why', ARGV[6])
if ARGV[2] ~= 'half-open' and ARGV[4] == 'open' then
  redis.call('hset', KEYS[1], 'opened_ms', now, 'probes_failed', 0)
  redis.call('hincrby', KEYS[3], 'openings', 1)
end
if ARGV[2] == 'half-open' and ARGV[4] == 'open' then redis.call('hincrby', KEYS[1], 'probes_failed', 1) end
redis.call('publish', ARGV[7], ARGV[1])
return 1

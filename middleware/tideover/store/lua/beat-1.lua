-- A worker's sign of life, by Redis' clock.
-- KEYS: heartbeats (zset)
-- ARGV: worker
-- Returns unix ms. Idempotent.
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('zrem', KEYS[1], ARGV[1])  -- first, because a full Redis lets a script write that began by taking away
redis.call('zadd', KEYS[1], now, ARGV[1])
return now

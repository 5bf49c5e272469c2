-- Gives back the jobs of one queue that a dead worker had fetched. Whether it is dead is decided here, by Redis' clock.
-- KEYS: heartbeats (zset), the worker's acks (set), queue (list), msgs (hash)
-- ARGV: worker, ms without a sign of life after which it is dead
-- Returns how many went back; -1 when the worker lives. Idempotent.
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local seen = redis.call('zscore', KEYS[1], ARGV[1])
if seen and now - tonumber(seen) < tonumber(ARGV[2]) then return -1 end
local n = 0
for _, id in ipairs(redis.call('smembers', KEYS[2])) do
  if redis.call('hexists', KEYS[4], id) == 1 then
    redis.call('lpush', KEYS[3], id)
    n = n + 1
  end
end
redis.call('del', KEYS[2])
return n

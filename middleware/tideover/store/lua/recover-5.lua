-- Gives back the jobs of one queue that a dead worker had fetched, and counts its death against those that may have caused it.
-- Whether it is dead is decided here, by Redis' clock.
-- KEYS: heartbeats (zset), the worker's acks (set), queue (list), msgs (hash), marks (hash)
-- ARGV: worker, ms without a sign of life after which it is dead
-- Returns how many went back; -1 when the worker lives. Idempotent.
-- The first death counts for every job aboard; later ones only for those that the worker had begun (see begin).
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local seen = redis.call('zscore', KEYS[1], ARGV[1])
if seen and now - tonumber(seen) < tonumber(ARGV[2]) then return -1 end
local n, ids = 0, redis.call('smembers', KEYS[2])
redis.call('del', KEYS[2])  -- first, because a full Redis lets a script write that began by taking away
for _, id in ipairs(ids) do
  if redis.call('hexists', KEYS[4], id) == 1 then
    local mark = redis.call('hget', KEYS[5], id) or '\t0\t0\t0\t'
    local known, deaths, begun = mark:match('^(.*)\t(%d+)\t([^\t]*)$')
    if known and (deaths == '0' or begun == ARGV[1]) then
      redis.call('hset', KEYS[5], id, string.format('%s\t%d\t', known, deaths + 1))
    end
    redis.call('lpush', KEYS[3], id)
    n = n + 1
  else
    redis.call('hdel', KEYS[5], id)
  end
end
return n

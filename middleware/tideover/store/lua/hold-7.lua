-- Holds fetched jobs: the acknowledgement itself moves their ids to a held set, so no instant lies between.
-- KEYS: the worker's acks (set), facts (hash), permits (hash), held set (zset), held sets in use (set), places (hash), counters (hash)
-- ARGV: queue name, name of the held set, then for each job: Redis id, job id, unix ms to release it by, facts
-- Returns for each job 1 held; 0 it is not this worker's any more.
-- Idempotent: SREM is the fence. Bodies stay where they are.
local held = {}
for i = 3, #ARGV, 4 do
  local id = ARGV[i]
  if redis.call('srem', KEYS[1], id) == 1 then
    redis.call('zadd', KEYS[4], ARGV[i + 2], id)
    redis.call('hset', KEYS[2], id, ARGV[i + 3])
    redis.call('hdel', KEYS[3], id)
    redis.call('hset', KEYS[6], ARGV[i + 1], ARGV[1] .. '\t' .. id)
    redis.call('sadd', KEYS[5], ARGV[2])
    redis.call('hincrby', KEYS[7], 'holds', 1)
    held[#held + 1] = 1
  else
    held[#held + 1] = 0
  end
end
return held

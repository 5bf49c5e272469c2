-- Moves dead letters of one queue to another, each with a new body.
-- KEYS: dead letters (zset), their msgs (hash), the other's dead letters (zset), their msgs (hash)
-- ARGV: for each: Redis id, new body
-- Returns how many moved. Idempotent: ZREM is the fence. Each keeps the time of its end.
local n = 0
for i = 1, #ARGV, 2 do
  local at = redis.call('zscore', KEYS[1], ARGV[i])
  if at then
    redis.call('zrem', KEYS[1], ARGV[i])
    redis.call('hdel', KEYS[2], ARGV[i])
    redis.call('zadd', KEYS[3], at, ARGV[i])
    redis.call('hset', KEYS[4], ARGV[i], ARGV[i + 1])
    n = n + 1
  end
end
return n

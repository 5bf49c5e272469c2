-- Moves jobs of one list to another, each with a new body: id and body in one step.
-- KEYS: list, its msgs (hash), the other list, its msgs (hash)
-- ARGV: for each job, the last first: Redis id, new body
-- Returns how many moved. Idempotent: LREM is the fence. They come to the head, in their order.
local n = 0
for i = 1, #ARGV, 2 do
  if redis.call('lrem', KEYS[1], -1, ARGV[i]) == 1 then
    redis.call('hdel', KEYS[2], ARGV[i])
    redis.call('hset', KEYS[4], ARGV[i], ARGV[i + 1])
    redis.call('lpush', KEYS[3], ARGV[i])
    n = n + 1
  end
end
return n

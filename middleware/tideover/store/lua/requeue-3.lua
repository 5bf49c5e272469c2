-- Gives fetched jobs back to the head of their queue, attempts unspent.
-- KEYS: the worker's acks (set), queue (list), msgs (hash)
-- ARGV: Redis ids, in the order in which they were fetched
-- Returns how many went back. Idempotent: SREM is the fence.
local n = 0
for i = #ARGV, 1, -1 do
  if redis.call('srem', KEYS[1], ARGV[i]) == 1 and redis.call('hexists', KEYS[3], ARGV[i]) == 1 then
    redis.call('lpush', KEYS[2], ARGV[i])
    n = n + 1
  end
end
return n

-- Forgets who runs for all with a key, if nobody waits for its answer.
-- KEYS: leaders (hash), waiters (zset), facts (hash)
-- ARGV: digest of the key
-- Returns 1 nobody waits; 0 somebody does. Who is not held any more does not wait. Idempotent.
local last = ARGV[1] .. string.rep('\255', 64)
repeat
  local waiter = redis.call('zrangebylex', KEYS[2], '[' .. ARGV[1], '[' .. last, 'limit', 0, 1)[1]
  if waiter and redis.call('hexists', KEYS[3], waiter:sub(17)) == 1 then return 0 end
  if waiter then redis.call('zrem', KEYS[2], waiter) end
until not waiter
redis.call('hdel', KEYS[1], ARGV[1])
return 1

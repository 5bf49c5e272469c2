-- Accepts one new job: its body, its place in the queue and its line in the account, at once.
-- KEYS: msgs (hash), queue (list), account (hash), queues (set)
-- ARGV: Redis id, body, queue name (without .DQ)
-- Returns 1; 0 when this very id is there already.
-- Idempotent: a script repeated after a lost reply finds its body and changes nothing.
if redis.call('hsetnx', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('rpush', KEYS[2], ARGV[1])
redis.call('hincrby', KEYS[3], 'accepted', 1)
redis.call('sadd', KEYS[4], ARGV[3])
return 1

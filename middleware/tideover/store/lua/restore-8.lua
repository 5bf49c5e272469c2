-- Puts a dead letter back into its queue, as a new job: it was accepted, ended, and is accepted again.
-- KEYS: dead letters (zset), their msgs (hash), msgs (hash), queue (list), account (hash), queues (set), tenants (hash),
--       counters (hash)
-- ARGV: Redis id, body, queue name, tenant ('' none)
-- Returns 1; 0 when it is no dead letter any more, or another lives under its id. Idempotent: ZREM is the fence; a repetition
-- finds the very body that it has put there, and each act's bodies are its own.
local live = redis.call('hget', KEYS[3], ARGV[1])
if live == ARGV[2] then return 1 end
if live or redis.call('zrem', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('hdel', KEYS[2], ARGV[1])
redis.call('hset', KEYS[3], ARGV[1], ARGV[2])
redis.call('rpush', KEYS[4], ARGV[1])
redis.call('hincrby', KEYS[5], 'accepted', 1)
redis.call('sadd', KEYS[6], ARGV[3])
if ARGV[4] ~= '' then redis.call('hincrby', KEYS[7], ARGV[4], 1) end
redis.call('hincrby', KEYS[8], 'restored', 1)
return 1

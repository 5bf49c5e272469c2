-- Replaces a fetched job by its successor: its retry, or itself when its delay is over. One job before, one after.
-- KEYS: msgs of the successor's queue (hash), that queue (list), queues (set), places (hash),
--       the predecessor's acks (set), its msgs (hash), its permits (hash), adopted (set)
-- ARGV: Redis id, body, list name of the successor; Redis id of the predecessor; job id; queue name of the successor (without .DQ)
-- Returns 1 handed over; 2 was already; 0 the predecessor is not ours any more, so whoever has it goes on with it.
-- Idempotent: the successor's body marks it as done.
if redis.call('hexists', KEYS[1], ARGV[1]) == 1 then return 2 end
if redis.call('srem', KEYS[5], ARGV[4]) == 0 then return 0 end
redis.call('hdel', KEYS[6], ARGV[4])
redis.call('hdel', KEYS[7], ARGV[4])
redis.call('srem', KEYS[8], ARGV[4])
redis.call('hset', KEYS[1], ARGV[1], ARGV[2])
redis.call('rpush', KEYS[2], ARGV[1])
redis.call('sadd', KEYS[3], ARGV[6])
redis.call('hset', KEYS[4], ARGV[5], ARGV[3] .. '\t' .. ARGV[1])
return 1

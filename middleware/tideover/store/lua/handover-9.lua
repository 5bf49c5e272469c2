-- Replaces a fetched job by its successor: its retry, or itself when its delay is over. One job before, one after.
-- KEYS: msgs of the successor's list (hash), that list, queues (set), places (hash), marks of the successor's list (hash),
--       the predecessor's acks (set), its msgs (hash), its marks (hash), adopted (set)
-- ARGV: Redis id, body, list name of the successor; Redis id of the predecessor; job id; queue name of the successor (without
--       .DQ)
-- Returns 1 handed over; 0 the predecessor is not ours any more, so whoever has it goes on with it, or this was done already.
-- Idempotent: SREM is the fence. How often and how long it was held, and how many workers died with it, goes along; a permit,
-- and which worker began it, does not.
if redis.call('srem', KEYS[6], ARGV[4]) == 0 then return 0 end
local mark = redis.call('hget', KEYS[8], ARGV[4])
redis.call('hdel', KEYS[7], ARGV[4])
redis.call('hdel', KEYS[8], ARGV[4])
redis.call('hset', KEYS[1], ARGV[1], ARGV[2])
redis.call('rpush', KEYS[2], ARGV[1])
redis.call('sadd', KEYS[3], ARGV[6])
if mark then redis.call('hset', KEYS[5], ARGV[1], mark:match('\t.*\t') or mark) end
redis.call('srem', KEYS[9], ARGV[4])
if ARGV[1] == ARGV[5] then redis.call('hdel', KEYS[4], ARGV[5])
else redis.call('hset', KEYS[4], ARGV[5], ARGV[3] .. '\t' .. ARGV[1]) end
return 1

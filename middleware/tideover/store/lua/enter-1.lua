-- Says who a worker is.
-- KEYS: workers (hash)
-- ARGV: worker, facts
-- Returns 1. Idempotent. It takes away first, because a full Redis then lets it write.
redis.call('hdel', KEYS[1], ARGV[1])
redis.call('hset', KEYS[1], ARGV[1], ARGV[2])
return 1

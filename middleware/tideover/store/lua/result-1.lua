-- Stores what a job came to where dramatiq looks for it. It takes away first, because a full Redis then lets it write: jobs
-- that wait with their results for room would never give any.
-- KEYS: the result (list)
-- ARGV: the encoded result, lifetime (ms)
-- Returns 1. Idempotent: it takes the place of an earlier one.
redis.call('del', KEYS[1])
redis.call('lpush', KEYS[1], ARGV[1])
redis.call('pexpire', KEYS[1], ARGV[2])
return 1

-- Counts jobs that left their places without an end, because a worker without tideover acknowledged them.
-- KEYS: account (hash)
-- ARGV: how many are counted, as the account was read; how many are to be added
-- Returns 1; 0 somebody has counted meanwhile. Idempotent: the number is the fence, so that nothing is counted twice.
if (redis.call('hget', KEYS[1], 'elsewhere') or '0') ~= ARGV[1] then return 0 end
redis.call('hincrby', KEYS[1], 'elsewhere', ARGV[2])
return 1

-- Corrects how many live jobs a tenant has.
-- KEYS: tenants (hash)
-- ARGV: tenant, its number when the jobs were counted, and how many there were
-- Returns 1; 0 its number has changed meanwhile, so that the count may be wrong. Idempotent: the number is the fence.
if redis.call('hget', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
if tonumber(ARGV[3]) > 0 then redis.call('hset', KEYS[1], ARGV[1], ARGV[3])
else redis.call('hdel', KEYS[1], ARGV[1]) end
return 1

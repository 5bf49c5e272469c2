-- Raises the number of the schema.
-- KEYS: schema (string)
-- ARGV: the number as it was seen, the new one
-- Returns 1 raised; 0 it is another one by now. Idempotent: the number is the fence.
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[2])
return 1

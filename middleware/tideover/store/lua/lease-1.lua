-- Takes a lease that nobody has.
-- KEYS: lease (string)
-- ARGV: token, lifetime (ms)
-- Returns 1 taken; 0 somebody has it. It takes away first, because a full Redis then lets it write.
-- Idempotent: repeated after a lost reply it finds its own token.
local holder = redis.call('get', KEYS[1])
if holder then return holder == ARGV[1] and 1 or 0 end
redis.call('del', KEYS[1])
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
return 1

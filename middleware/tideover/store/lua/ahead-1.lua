-- How many held jobs of some groups go before one.
-- KEYS: held (zset)
-- ARGV: its order and id, then group ids
-- Returns their number. Reads only.
local n = 0
for i = 2, #ARGV do n = n + redis.call('zlexcount', KEYS[1], '(' .. ARGV[i], '(' .. ARGV[i] .. ARGV[1]) end
return n

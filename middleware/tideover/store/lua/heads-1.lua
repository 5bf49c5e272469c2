-- The first held jobs of each of some groups, in order.
-- KEYS: held (zset)
-- ARGV: most of each group, after which order and id ('' from the start), up to which order ('' to the end), then group ids
-- Returns members. Reads only.
local out = {}
local low = ARGV[2] == '' and '' or ARGV[2]
local high = ARGV[3] == '' and string.rep('\255', 23) or ARGV[3] .. string.rep('\255', 17)
for i = 4, #ARGV do
  local found = redis.call('zrangebylex', KEYS[1], '(' .. ARGV[i] .. low, '(' .. ARGV[i] .. high, 'limit', 0, ARGV[1])
  for j = 1, #found do out[#out + 1] = found[j] end
end
return out

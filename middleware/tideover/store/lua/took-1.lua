-- Tells what calls took of their route's tokens per minute, in place of what was set aside for them.
-- KEYS: limiter (hash)
-- ARGV: tokens beyond those set aside (below 0: fewer), calls that told their tokens, tokens that these took
-- Returns nothing. Not idempotent: what is told again because a reply was lost counts twice.
if redis.call('exists', KEYS[1]) == 0 then return end
local known = redis.call('hmget', KEYS[1], 'tokens', 'each')
redis.call('hset', KEYS[1], 'tokens', tostring(tonumber(known[1]) - ARGV[1]))
if tonumber(ARGV[2]) > 0 then
  local mean = ARGV[3] / ARGV[2]
  local each = tonumber(known[2] or mean)
  redis.call('hset', KEYS[1], 'each', tostring(each + (mean - each) * ARGV[2] / (ARGV[2] + 20)))  -- of the last twenty or so
end

-- Adds what calls of a route and model came to, and takes those that no release has paid for out of the bucket.
-- KEYS: pace (hash), bucket (hash)
-- ARGV: calls to take, quiet asked for (ms; 0 none), limits (JSON; '' not told), then pairs of counters and numbers
-- Returns nothing. Not idempotent: what is told again after a lost reply counts twice, and the pace is a little too careful.
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
for i = 4, #ARGV, 2 do
  if ARGV[i + 1] ~= '0' then redis.call('hincrby', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
if ARGV[2] ~= '0' then
  local known = tonumber(redis.call('hget', KEYS[1], 'quiet_until_ms') or '0')
  redis.call('hset', KEYS[1], 'quiet_until_ms', string.format('%.0f', math.max(known, now + tonumber(ARGV[2]))))
end
if ARGV[3] ~= '' then redis.call('hset', KEYS[1], 'limits', ARGV[3]) end
redis.call('expire', KEYS[1], 3600)
if ARGV[1] ~= '0' then
  local rate = tonumber(redis.call('hget', KEYS[1], 'rate') or '0')
  local tokens = tonumber(redis.call('hget', KEYS[2], 'tokens') or '0')
  redis.call('hset', KEYS[2], 'tokens', tostring(math.max(tokens - tonumber(ARGV[1]), -10 * rate)))
  redis.call('hsetnx', KEYS[2], 'at', string.format('%.3f', now / 1000))  -- from where the next release refills it
  redis.call('expire', KEYS[2], 3600)
end

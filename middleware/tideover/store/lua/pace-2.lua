-- Makes a pace known, unless somebody else did so meanwhile.
-- KEYS: pace (hash), breaker (hash)
-- ARGV: when it was made known last, as seen (unix ms; 0 never), the leader's notes (JSON), calls per second, factor
-- Returns 1 known; 0 somebody was faster. Idempotent: what was seen is the fence.
local last = redis.call('hget', KEYS[1], 'published_ms') or '0'
if last ~= ARGV[1] then return 0 end
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if now <= tonumber(last) then now = tonumber(last) + 1 end
redis.call('hset', KEYS[1], 'published_ms', string.format('%.0f', now), 'pacer', ARGV[2], 'rate', ARGV[3], 'factor', ARGV[4])
redis.call('expire', KEYS[1], 3600)
redis.call('hset', KEYS[2], 'pace', ARGV[3], 'limited_by', ARGV[4], 'paced_ms', string.format('%.0f', now))
return 1

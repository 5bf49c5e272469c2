-- Releases held jobs at a pace, each with a permit: ids go back to their queue, the bodies never left.
-- KEYS: held set (zset), facts (hash), queue (list), permits (hash), held sets in use (set), breaker (hash), bucket (hash),
--       counters (hash), msgs (hash)
-- ARGV: name of the held set, generation ('' when any will do), permit, rate (jobs/s), burst (jobs), longest queue to leave (jobs)
-- Returns the facts of the released, and how many are left.
-- Atomic: token, permit and move are one step, so any number of processes may call it. A breaker that moved on releases nothing.
if ARGV[2] ~= '' then
  local b = redis.call('hmget', KEYS[6], 'state', 'generation')
  if (b[2] or '0') ~= ARGV[2] or b[1] == 'open' or b[1] == 'half-open' then return {{}, redis.call('zcard', KEYS[1])} end
end
local t = redis.call('time')
local now = t[1] + t[2] / 1000000
local bucket = redis.call('hmget', KEYS[7], 'tokens', 'at')
local rate, burst = tonumber(ARGV[4]), tonumber(ARGV[5])
local tokens = tonumber(bucket[1] or '1') + math.max(0, now - tonumber(bucket[2] or now)) * rate
if tokens > burst then tokens = burst end
local n = math.min(math.floor(tokens), tonumber(ARGV[6]) - redis.call('llen', KEYS[3]), 500)
local out = {}
if n > 0 then
  local popped = redis.call('zpopmin', KEYS[1], n)
  for i = 1, #popped, 2 do
    local id = popped[i]
    out[#out + 1] = redis.call('hget', KEYS[2], id) or ''
    redis.call('hdel', KEYS[2], id)
    if redis.call('hexists', KEYS[9], id) == 1 then
      redis.call('rpush', KEYS[3], id)
      redis.call('hset', KEYS[4], id, ARGV[3])
    end
  end
  if #out > 0 then redis.call('hincrby', KEYS[8], 'releases', #out) end
end
redis.call('hset', KEYS[7], 'tokens', tostring(tokens - #out), 'at', string.format('%.6f', now))
redis.call('expire', KEYS[7], 3600)
local left = redis.call('zcard', KEYS[1])
if left == 0 then redis.call('srem', KEYS[5], ARGV[1]) end
return {out, left}

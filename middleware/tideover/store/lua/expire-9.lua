-- Ends held jobs that are past their expiry; their bodies become dead letters.
-- KEYS: held set (zset), facts (hash), msgs (hash), account (hash), adopted (set), places (hash), dead letters (zset), their msgs (hash),
--       held sets in use (set)
-- ARGV: name of the held set, then for each job: Redis id, job id
-- Returns the job ids that it ended. Idempotent: ZREM is the fence.
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local out = {}
for i = 2, #ARGV, 2 do
  local id, job = ARGV[i], ARGV[i + 1]
  if redis.call('zrem', KEYS[1], id) == 1 then
    local body = redis.call('hget', KEYS[3], id)
    if body then
      redis.call('zadd', KEYS[7], now, id)
      redis.call('hset', KEYS[8], id, body)
    end
    redis.call('hdel', KEYS[3], id)
    redis.call('hdel', KEYS[2], id)
    redis.call('srem', KEYS[5], id)
    redis.call('hdel', KEYS[6], job)
    redis.call('hincrby', KEYS[4], 'expired', 1)
    out[#out + 1] = job
  end
end
if redis.call('zcard', KEYS[1]) == 0 then redis.call('srem', KEYS[9], ARGV[1]) end
return out

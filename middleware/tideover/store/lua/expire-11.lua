-- Ends held jobs: they are past their expiry, somebody discards them, and their bodies become dead letters; or a job with
-- their key has succeeded.
-- KEYS: held (zset), facts (hash), groups (hash), counts (hash), msgs (hash), account (hash), adopted (set), places (hash),
--       dead letters (zset), their msgs (hash), tenants (hash)
-- ARGV: end (a field of account), then for each job: member, Redis id, job id, tenant ('' none)
-- Returns for each job 1 ended, 0 it was not held any more. Idempotent: ZREM is the fence.
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local out = {}
for i = 2, #ARGV, 4 do
  local member, id, job, tenant = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  out[#out + 1] = redis.call('zrem', KEYS[1], member)
  if out[#out] == 1 then
    redis.call('hdel', KEYS[2], member:sub(13))
    if redis.call('hincrby', KEYS[4], member:sub(1, 6), -1) <= 0 then
      redis.call('hdel', KEYS[4], member:sub(1, 6))
      redis.call('hdel', KEYS[3], member:sub(1, 6))
    end
    local body = redis.call('hget', KEYS[5], id)
    if body then
      redis.call('hdel', KEYS[5], id)
      if ARGV[1] ~= 'succeeded' then
        redis.call('zadd', KEYS[9], now, id)
        redis.call('hset', KEYS[10], id, body)
      end
    end
    redis.call('srem', KEYS[7], id)
    redis.call('hdel', KEYS[8], job)
    redis.call('hincrby', KEYS[6], ARGV[1], 1)
    if tenant ~= '' and redis.call('hincrby', KEYS[11], tenant, -1) <= 0 then redis.call('hdel', KEYS[11], tenant) end
  end
end
return out

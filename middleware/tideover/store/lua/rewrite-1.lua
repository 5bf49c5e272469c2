-- Replaces bodies of jobs that are as they were read.
-- KEYS: msgs (hash)
-- ARGV: for each job: Redis id, body as it was read, new body
-- Returns how many were replaced. Idempotent: the old body is the fence.
local n = 0
for i = 1, #ARGV, 3 do
  if redis.call('hget', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    redis.call('hset', KEYS[1], ARGV[i], ARGV[i + 2])
    n = n + 1
  end
end
return n

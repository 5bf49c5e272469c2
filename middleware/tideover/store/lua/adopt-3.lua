-- Enters fetched jobs into the account that a producer without tideover sent.
-- KEYS: the worker's acks (set), adopted (set), account (hash)
-- ARGV: Redis ids
-- Returns how many were new. Idempotent: an id is adopted once, and only by the worker that has it.
local n = 0
redis.call('srem', KEYS[2], '')  -- nothing; but a full Redis lets a script write that began by taking away
for _, id in ipairs(ARGV) do
  if redis.call('sismember', KEYS[1], id) == 1 then n = n + redis.call('sadd', KEYS[2], id) end
end
if n > 0 then redis.call('hincrby', KEYS[3], 'accepted', n) end
return n

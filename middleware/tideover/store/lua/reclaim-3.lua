-- Gives back what a worker fetched without knowing it: a reply that was lost, a consumer that was rebuilt.
-- KEYS: the worker's acks (set), queue (list), msgs (hash)
-- ARGV: the Redis ids that the worker knows it has
-- Returns how many went back. Idempotent.
local known = {}
for i = 1, #ARGV do known[ARGV[i]] = true end
local n = 0
for _, id in ipairs(redis.call('smembers', KEYS[1])) do
  if not known[id] then
    redis.call('srem', KEYS[1], id)
    if redis.call('hexists', KEYS[3], id) == 1 then
      redis.call('lpush', KEYS[2], id)
      n = n + 1
    end
  end
end
return n

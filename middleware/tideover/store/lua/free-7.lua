-- Releases chosen held jobs at once: an operator's hand.
-- KEYS: held set (zset), facts (hash), queue (list), permits (hash), held sets in use (set), counters (hash), msgs (hash)
-- ARGV: name of the held set, permit, Redis ids in the order in which they shall run
-- Returns the facts of those it released. Idempotent: ZREM is the fence.
local out, go = {}, {}
for i = 3, #ARGV do
  local id = ARGV[i]
  if redis.call('zrem', KEYS[1], id) == 1 then
    out[#out + 1] = redis.call('hget', KEYS[2], id) or ''
    redis.call('hdel', KEYS[2], id)
    if redis.call('hexists', KEYS[7], id) == 1 then
      go[#go + 1] = id
      redis.call('hset', KEYS[4], id, ARGV[2])
    end
  end
end
for i = #go, 1, -1 do redis.call('lpush', KEYS[3], go[i]) end
if #out > 0 then redis.call('hincrby', KEYS[6], 'releases', #out) end
if redis.call('zcard', KEYS[1]) == 0 then redis.call('srem', KEYS[5], ARGV[1]) end
return out

-- Says of jobs with a key, which are about to be held, who runs for all that have it: the first, while it lives; not while
-- it waits for its next attempt.
-- KEYS: leaders (hash), msgs (hash)
-- ARGV: for each job: digest of its key, its order, its Redis id
-- Returns for each job the Redis id of its leader, '' it leads itself: also if it must go before the other.
-- Idempotent: who leads goes on to lead.
local out = {}
for i = 1, #ARGV, 3 do
  local digest, order, id = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  local noted = redis.call('hget', KEYS[1], digest)
  local led_order, leader = (noted or ''):match('^(%d+)\t(.*)$')
  local lives = leader and leader ~= id and redis.call('hexists', KEYS[2], leader) == 1
  if lives and order >= tonumber(led_order) then
    out[#out + 1] = leader
  else
    redis.call('hset', KEYS[1], digest, string.format('%.0f\t%s', order, id))
    out[#out + 1] = ''
  end
end
return out

-- Reads the account in one instant.
-- KEYS: account (hash), heartbeats (zset), queues (set), then the places to count
-- ARGV: how many of those places are lists; how many, after them, are sets; the others are zsets
-- Returns the account, the heartbeats' workers, the queues, and three lists of sizes.
local lists, sets = tonumber(ARGV[1]), tonumber(ARGV[2])
local queued, running, held = {}, {}, {}
for i = 4, #KEYS do
  local at = i - 3
  if at <= lists then queued[#queued + 1] = redis.call('llen', KEYS[i])
  elseif at <= lists + sets then running[#running + 1] = redis.call('scard', KEYS[i])
  else held[#held + 1] = redis.call('zcard', KEYS[i]) end
end
return {redis.call('hgetall', KEYS[1]), redis.call('zrange', KEYS[2], 0, -1), redis.call('smembers', KEYS[3]),
  queued, running, held}

-- Forgets dead letters that are older than their lifetime, a batch at a time.
-- KEYS: dead letters (zset), their msgs (hash)
-- ARGV: lifetime (ms), batch
-- Returns how many it forgot. Idempotent.
local t = redis.call('time')
local before = t[1] * 1000 + math.floor(t[2] / 1000) - tonumber(ARGV[1])
local ids = redis.call('zrangebyscore', KEYS[1], '-inf', before, 'limit', 0, ARGV[2])
if #ids > 0 then
  redis.call('zrem', KEYS[1], unpack(ids))
  redis.call('hdel', KEYS[2], unpack(ids))
end
return #ids

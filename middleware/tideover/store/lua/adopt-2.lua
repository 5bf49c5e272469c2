-- Enters jobs into the account that a producer without tideover sent.
-- KEYS: adopted (set), account (hash)
-- ARGV: Redis ids
-- Returns how many were new. Idempotent: an id is adopted once.
local n = redis.call('sadd', KEYS[1], unpack(ARGV))
if n > 0 then redis.call('hincrby', KEYS[2], 'accepted', n) end
return n

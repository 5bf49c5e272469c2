-- Lets a member of a group arrive at dramatiq's barrier: each member counts once, however often it ran.
-- KEYS: the barrier (string: how many are missing), members that have arrived (set)
-- ARGV: job id of the member, lifetime (ms)
-- Returns 1 when none is missing, now or before; else 0. Idempotent. A barrier that is gone counts as reached, as in dramatiq.
redis.call('srem', KEYS[2], '')  -- nothing; but a full Redis lets a script write that began by taking away
local missing = tonumber(redis.call('get', KEYS[1]) or '0')
if redis.call('sadd', KEYS[2], ARGV[1]) == 1 and missing > 0 then missing = redis.call('decr', KEYS[1]) end
redis.call('pexpire', KEYS[1], ARGV[2])
redis.call('pexpire', KEYS[2], ARGV[2])
return missing <= 0 and 1 or 0

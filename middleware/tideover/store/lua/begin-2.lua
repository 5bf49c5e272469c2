-- Notes that a worker is about to run a job that was aboard when another worker died: if this one dies, too, it may be the job.
-- KEYS: the worker's acks (set), marks (hash)
-- ARGV: Redis id, mark
-- Returns 1; 0 when the job is not this worker's any more. Idempotent.
if redis.call('sismember', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('hdel', KEYS[2], ARGV[1])  -- first, because a full Redis lets a script write that began by taking away
redis.call('hset', KEYS[2], ARGV[1], ARGV[2])
return 1

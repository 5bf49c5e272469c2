-- Forgets a worker, unless it has jobs: those must be found and given back first, and only its heartbeat leads to them.
-- KEYS: workers (hash), heartbeats (zset), then the worker's acks (sets), one of each list
-- ARGV: worker
-- Returns 1 forgotten; 0 it has jobs. Idempotent.
for i = 3, #KEYS do
  if redis.call('scard', KEYS[i]) > 0 then return 0 end
end
redis.call('hdel', KEYS[1], ARGV[1])
redis.call('zrem', KEYS[2], ARGV[1])
return 1

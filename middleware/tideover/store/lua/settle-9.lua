-- Ends one fetched job: this is dramatiq's ack (or nack) and the job's last line in the account.
-- KEYS: the worker's acks (set), msgs (hash), account (hash), marks (hash), adopted (set), places (hash),
--       dead letters (zset), their msgs (hash), tenants (hash)
-- ARGV: Redis id, job id, end (a field of account), '1' to keep the body as a dead letter, tenant ('' none)
-- Returns 1; 0 when the job is not this worker's any more.
-- Idempotent: SREM is the fence; a worker that was declared dead, or a repetition, changes nothing.
if redis.call('srem', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[4] == '1' then
  local body = redis.call('hget', KEYS[2], ARGV[1])
  if body then
    local t = redis.call('time')
    redis.call('zadd', KEYS[7], t[1] * 1000 + math.floor(t[2] / 1000), ARGV[1])
    redis.call('hset', KEYS[8], ARGV[1], body)
  end
end
redis.call('hdel', KEYS[2], ARGV[1])
redis.call('hdel', KEYS[4], ARGV[1])
redis.call('srem', KEYS[5], ARGV[1])
redis.call('hdel', KEYS[6], ARGV[2])
redis.call('hincrby', KEYS[3], ARGV[3], 1)
if ARGV[5] ~= '' and redis.call('hincrby', KEYS[9], ARGV[5], -1) <= 0 then redis.call('hdel', KEYS[9], ARGV[5]) end
return 1

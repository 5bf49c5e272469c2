-- Ends fetched jobs of one list: this is dramatiq's ack (or nack), and each job's last line in the account.
-- KEYS: the worker's acks (set), msgs (hash), account (hash), marks (hash), adopted (set), places (hash),
--       dead letters (zset), their msgs (hash), tenants (hash)
-- ARGV: for each job: Redis id, more ('' it succeeded, and there is nothing more to say; else with tabs between: end (a field
--       of account), '1' to keep the body as a dead letter, tenant, job id)
-- Returns for each job 1; 0 when it is not this worker's any more.
-- Idempotent: SREM is the fence; a worker that was declared dead, or a repetition, changes nothing. It takes away first,
-- because a full Redis then lets it write.
local ours, ids, job_ids, ends = {}, {}, {}, {}
for i = 1, #ARGV, 2 do
  local id, more, n = ARGV[i], ARGV[i + 1], (i + 1) / 2
  ours[n] = redis.call('srem', KEYS[1], id)
  if ours[n] == 1 then
    local ended, keep, tenant, job_id = 'succeeded', '0', '', id
    if more ~= '' then ended, keep, tenant, job_id = more:match('^([^\t]*)\t([^\t]*)\t([^\t]*)\t(.*)$') end
    ids[#ids + 1], job_ids[#job_ids + 1] = id, job_id
    ends[ended] = (ends[ended] or 0) + 1
    local body = keep == '1' and redis.call('hget', KEYS[2], id)
    if body then
      local t = redis.call('time')
      redis.call('zadd', KEYS[7], t[1] * 1000 + math.floor(t[2] / 1000), id)
      redis.call('hset', KEYS[8], id, body)
    end
    if tenant ~= '' and redis.call('hincrby', KEYS[9], tenant, -1) <= 0 then redis.call('hdel', KEYS[9], tenant) end
  end
end
if #ids == 0 then return ours end
redis.call('hdel', KEYS[2], unpack(ids))
redis.call('hdel', KEYS[4], unpack(ids))
redis.call('srem', KEYS[5], unpack(ids))
redis.call('hdel', KEYS[6], unpack(job_ids))
for ended, n in pairs(ends) do redis.call('hincrby', KEYS[3], ended, n) end
return ours

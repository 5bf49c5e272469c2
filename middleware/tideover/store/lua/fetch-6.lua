-- Takes up to n jobs off a queue for one worker, which is a sign of life of that worker, too.
-- KEYS: queue (list), msgs (hash), the worker's acks (set), heartbeats (zset), marks (hash), queues (set)
-- ARGV: n, worker, queue name (without .DQ): so that jobs of a queue that only strangers send to are counted
-- Returns the sizes of many strings (decimal, with spaces between; -1: there is none), and these strings in one: all ids, then
-- all bodies; and those marks that there are, each after the number of its job.
-- After a lost reply the ids are in the worker's acks: reclaim gives them back.
local ids = redis.call('lpop', KEYS[1], ARGV[1])  -- first, because a full Redis lets a script write that began by taking away
local t = redis.call('time')
redis.pcall('zadd', KEYS[4], t[1] * 1000 + math.floor(t[2] / 1000), ARGV[2])
if not ids then return {'', '', {}} end
redis.call('sadd', KEYS[3], unpack(ids))
redis.call('sadd', KEYS[6], ARGV[3])
local marked = {}
if redis.call('exists', KEYS[5]) == 1 then
  local marks = redis.call('hmget', KEYS[5], unpack(ids))
  for i = 1, #ids do if marks[i] then marked[#marked + 1], marked[#marked + 2] = i - 1, marks[i] end end
end
local said, sizes = ids, {}
for _, body in ipairs(redis.call('hmget', KEYS[2], unpack(ids))) do said[#said + 1] = body end
for i = 1, #said do sizes[i], said[i] = said[i] and #said[i] or -1, said[i] or '' end
return {table.concat(sizes, ' '), table.concat(said), marked}

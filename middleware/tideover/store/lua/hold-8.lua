-- Holds fetched jobs: the acknowledgement itself moves their ids to the held set, so no instant lies between.
-- KEYS: the worker's acks (set), held (zset), facts (hash), marks (hash), groups (hash), counts (hash), places (hash),
--       counters (hash)
-- ARGV: queue name, most groups, number of groups, then for each of these: group id, facet;
--       then for each job: Redis id, member, packed facts, job id where it is another than the Redis id ('' else)
-- Returns for each job 1 held, 0 it is not this worker's any more; or, having changed nothing, 'refused' and the numbers of the
-- groups that cannot be entered: there are too many, or another facet has this group id.
-- Idempotent: SREM is the fence. Bodies stay where they are. It takes away first, because a full Redis then lets it write.
local refused, fresh, entered, last = {}, {}, {}, 3 + 2 * ARGV[3]
for i = 4, last, 2 do
  local facet = entered[ARGV[i]] or redis.call('hget', KEYS[5], ARGV[i])
  if not facet then fresh[#fresh + 1] = i end
  entered[ARGV[i]] = facet or ARGV[i + 1]
  if facet and facet ~= ARGV[i + 1] or not facet and redis.call('hlen', KEYS[5]) + #fresh > tonumber(ARGV[2]) then
    refused[#refused + 1] = (i - 4) / 2
  end
end
if #refused > 0 then return {'refused', unpack(refused)} end
local ids = {}
for i = last + 1, #ARGV, 4 do ids[#ids + 1] = ARGV[i] end
local ours = redis.call('smismember', KEYS[1], unpack(ids))
if redis.call('srem', KEYS[1], unpack(ids)) == 0 then return ours end
local members, facts, marked, gained, done = {}, {}, {}, {}, {}
for j = 1, #ids do
  local at = last + 4 * j - 3
  local member = ARGV[at + 1]
  if ours[j] == 1 and not done[ids[j]] then
    done[ids[j]] = true
    members[#members + 1], members[#members + 2] = 0, member
    facts[#facts + 1], facts[#facts + 2] = member:sub(13), member:sub(1, 12) .. ARGV[at + 2]
    marked[#marked + 1] = ids[j]
    gained[member:sub(1, 6)] = (gained[member:sub(1, 6)] or 0) + 1
    if ARGV[at + 3] ~= '' then redis.call('hset', KEYS[7], ARGV[at + 3], ARGV[1] .. '\t' .. ids[j]) end
  end
end
redis.call('zadd', KEYS[2], unpack(members))
redis.call('hset', KEYS[3], unpack(facts))
redis.call('hdel', KEYS[4], unpack(marked))
for _, i in ipairs(fresh) do if gained[ARGV[i]] then redis.call('hset', KEYS[5], ARGV[i], ARGV[i + 1]) end end
for group, more in pairs(gained) do redis.call('hincrby', KEYS[6], group, more) end
redis.call('hincrby', KEYS[8], 'holds', #marked)
return ours

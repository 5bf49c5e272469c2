-- Holds fetched jobs: the acknowledgement itself moves their ids to the held set, so no instant lies between.
-- KEYS: the worker's acks (set), held (zset), facts (hash), marks (hash), groups (hash), counts (hash), places (hash),
--       counters (hash), leaders (hash), waiters (zset)
-- ARGV: queue name, most groups, number of groups, number of jobs, number of arguments about ids; then for each group: group
--       id, facet; then for each job: Redis id, member, packed facts; then for each job whose id is another than its Redis id:
--       job id, Redis id; then for each that waits for another's answer: digest of its key, packed id, its leader, Redis id
-- Returns the numbers of the jobs that are not this worker's any more; or, having changed nothing, 'refused' and the
-- numbers of the groups that cannot be entered: there are too many, or another facet has this group id.
-- Idempotent: SREM is the fence. Bodies stay where they are. It takes away first, because a full Redis then lets it write.
local n_groups, n = tonumber(ARGV[3]), tonumber(ARGV[4])
local names, facets = {}, {}
for i = 1, n_groups do names[i], facets[i] = ARGV[4 + 2 * i], ARGV[5 + 2 * i] end
local known, refused, fresh, room = redis.call('hmget', KEYS[5], unpack(names)), {}, {}, nil
for i = 1, n_groups do
  local facet = known[i] or fresh[names[i]]
  if not facet then
    room = (room or tonumber(ARGV[2]) - redis.call('hlen', KEYS[5])) - 1
    facet, fresh[names[i]] = room >= 0 and facets[i], facets[i]
  end
  if facet ~= facets[i] then refused[#refused + 1] = i - 1 end
end
if #refused > 0 then return {'refused', unpack(refused)} end
local first, ids = 5 + 2 * n_groups, {}
for j = 1, n do ids[j] = ARGV[first + 3 * j - 2] end
local ours, gone = redis.call('smismember', KEYS[1], unpack(ids)), {}
for j = 1, n do if ours[j] == 0 then gone[#gone + 1] = j - 1 end end
if #gone == n then return gone end
redis.call('srem', KEYS[1], unpack(ids))
local members, facts, marked, gained, done = {}, {}, {}, {}, {}
for j = 1, n do
  local id = ids[j]
  if ours[j] == 1 and not done[id] then
    local member, at = ARGV[first + 3 * j - 1], #members
    local group = member:sub(1, 6)
    done[id], marked[#marked + 1], gained[group] = true, id, (gained[group] or 0) + 1
    members[at + 1], members[at + 2] = 0, member
    facts[at + 1], facts[at + 2] = member:sub(13), ARGV[first + 3 * j]
  end
end
redis.call('zadd', KEYS[2], unpack(members))
redis.call('hset', KEYS[3], unpack(facts))
if redis.call('exists', KEYS[4]) == 1 then redis.call('hdel', KEYS[4], unpack(marked)) end
local sizes, grown, entered = redis.call('hmget', KEYS[6], unpack(names)), {}, {}
for i = 1, n_groups do
  local name = names[i]
  if gained[name] then
    grown[#grown + 1], grown[#grown + 2] = name, tonumber(sizes[i] or '0') + gained[name]
    if fresh[name] then entered[#entered + 1], entered[#entered + 2] = name, facets[i] end
  end
end
redis.call('hset', KEYS[6], unpack(grown))
if #entered > 0 then redis.call('hset', KEYS[5], unpack(entered)) end
local waiters = first + 3 * n + ARGV[5]
for i = first + 3 * n + 1, waiters, 2 do
  if done[ARGV[i + 1]] then redis.call('hset', KEYS[7], ARGV[i], ARGV[1] .. '\t' .. ARGV[i + 1]) end
end
for i = waiters + 1, #ARGV, 4 do
  if done[ARGV[i + 3]] then
    redis.call('zadd', KEYS[10], 0, ARGV[i] .. ARGV[i + 1])
    redis.call('hsetnx', KEYS[9], ARGV[i], '0\t' .. ARGV[i + 2])  -- so that who waits is found
  end
end
redis.call('hincrby', KEYS[8], 'holds', #marked)
return gone

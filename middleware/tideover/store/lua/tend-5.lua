-- Lets the most urgent of those with one key run where the one that was to run for all has ended without an answer, or waits
-- for a human, or for its next attempt.
-- KEYS: leaders (hash), waiters (zset), msgs (hash), facts (hash), groups (hash)
-- ARGV: cursor, about how many keys to look at
-- Returns the next cursor, and the members of held jobs that are to go, whatever their group.
-- Idempotent: who was chosen stays so until it has gone.
local x = '[0-9a-f]'
local uuid = '^' .. x:rep(8) .. '%-' .. x:rep(4) .. '%-' .. x:rep(4) .. '%-' .. x:rep(4) .. '%-' .. x:rep(12) .. '$'
local function packed(id)
  if not id:match(uuid) then return id .. string.rep('\0', 17 - #id) end
  return (id:gsub('-', ''):gsub('%x%x', function(hex) return string.char(tonumber(hex, 16)) end))
end
local function text(raw)
  if #raw ~= 16 then return (raw:gsub('%z+$', '')) end
  return string.format('%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x', raw:byte(1, 16))
end
local function order(facts)
  local n = 0
  for i = 7, 12 do n = n * 256 + facts:byte(i) end
  return n
end
local function freed_by_nobody(facts)  -- the wait key, which a facet begins with, is empty
  return (redis.call('hget', KEYS[5], facts:sub(1, 6)) or ''):sub(1, 1) == '\31'
end
local most = 500  -- entries that are out of date, in a call: the next one goes on
local function choose(digest)  -- of the first hundred who wait
  local last, best, facts_of_best, waiting = digest .. string.rep('\255', 64), nil, nil, nil
  repeat
    waiting = redis.call('zrangebylex', KEYS[2], '[' .. digest, '[' .. last, 'limit', 0, 100)
    most = most - #waiting
    for _, waiter in ipairs(waiting) do
      local facts = redis.call('hget', KEYS[4], waiter:sub(17))
      if not facts or freed_by_nobody(facts) then
        redis.call('zrem', KEYS[2], waiter)
      elseif not best or order(facts) < order(facts_of_best) then
        best, facts_of_best = waiter:sub(17), facts
      end
    end
  until best or #waiting == 0 or most <= 0
  return best, facts_of_best, #waiting > 0
end
local found = redis.call('hscan', KEYS[1], ARGV[1], 'count', ARGV[2])
local out = {found[1]}
for i = 1, #found[2], 2 do
  local digest, leader = found[2][i], found[2][i + 1]:match('^%d+\t(.*)$')
  local raw = packed(leader)
  local facts = redis.call('hget', KEYS[4], raw)
  local lives = redis.call('hexists', KEYS[3], leader) == 1
  if facts and freed_by_nobody(facts) then facts, lives = nil, false end
  if facts and redis.call('zscore', KEYS[2], digest .. raw) then
    out[#out + 1] = facts:sub(1, 12) .. raw
  elseif not lives then
    local chosen, known, more = choose(digest)
    if chosen then
      redis.call('hset', KEYS[1], digest, string.format('%.0f\t%s', order(known), text(chosen)))
      out[#out + 1] = known:sub(1, 12) .. chosen
    elseif not more then
      redis.call('hdel', KEYS[1], digest)
    end
  end
end
return out

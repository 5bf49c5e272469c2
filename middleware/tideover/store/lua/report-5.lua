-- Takes in evidence of one breaker: moves its charts (as `core.detector.after` does), and reads it.
-- KEYS: breaker (hash), reporters (zset), failing (zset), latencies (hash), breakers (set)
-- ARGV: key of the breaker, process, era of the evidence ('' to read only), runs ('o12 f3 b1'), why (of a failure; '' none),
--       quiet asked for by the provider (ms; 0 none), latencies ('field n field n'), news channel, time constant of the base
--       (s), where charts stop (1.25 times their threshold), then up and down of the charts brownout, blackout and majority,
--       version of the breaker that the caller knows ('' none)
-- Returns the breaker as a flat list (if the caller knows the rest: only what evidence moves, in the order of `EVIDENCE` in
--       store/breakers.py), whether it is whole, reporters, failing, now (unix ms).
-- Not idempotent: evidence reported again after a lost reply counts twice. Evidence of another era, or while the breaker is
-- open, counts not at all.
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('zremrangebyscore', KEYS[2], '-inf', now - 60000)  -- a full Redis lets a script write that began by taking away
local failing = redis.call('zcard', KEYS[3])
if failing > 0 then
  redis.call('zremrangebyscore', KEYS[3], '-inf', now - 60000)
  failing = redis.call('zcard', KEYS[3])
end
local b = redis.call('hmget', KEYS[1], 'state', 'era', 'began_ms', 'brownout', 'blackout', 'majority', 'calls', 'failed', 'ok',
  'base_calls', 'base_failed', 'base_ms', 'throttled_until_ms', 'version', 'row')
local state = b[1] or 'closed'
local set = {}
local function put(name, value) set[#set + 1], set[#set + 2] = name, value end
if ARGV[3] == (b[2] or '0') and ARGV[4] ~= '' and state ~= 'open' and state ~= 'half-open' then
  local top = tonumber(ARGV[10])
  local s = {tonumber(b[4] or '0'), tonumber(b[5] or '0'), tonumber(b[6] or '0')}
  local calls, failed, ok = tonumber(b[7] or '0'), tonumber(b[8] or '0'), tonumber(b[9] or '0')
  local usual = math.max(s[1], s[2]) < top / 2.5
  local ended, bad, last, row = 0, 0, '', tonumber(b[15] or '0')
  for kind, count in ARGV[4]:gmatch('(%a)(%d+)') do
    local n = tonumber(count)
    for i = 1, 3 do
      local up, down = ARGV[9 + 2 * i], ARGV[10 + 2 * i]
      if kind == 'f' then s[i] = math.min(top, s[i] + n * up)
      elseif kind == 'o' then s[i] = math.max(0, s[i] + n * down)
      elseif kind == 'l' then s[i] = math.min(top, s[i] + n * (up - down))
      else s[i] = math.max(0, s[i] + n * (down - up)) end
    end
    if kind == 'f' then calls, failed, ended, bad = calls + n, failed + n, ended + n, bad + n
    elseif kind == 'o' then calls, ok, ended = calls + n, ok + n, ended + n
    elseif kind == 'l' then calls, failed, ok, bad = math.max(calls, failed + n), failed + n, math.max(0, ok - n), bad + n
    else failed, ok, bad = math.max(0, failed - n), ok + n, bad - n end
    if math.max(s[1], s[2]) == 0 then calls, failed = 0, 0 end
    row = (kind == 'f' or kind == 'l') and 0 or row + n
    last = kind
  end
  put('brownout', tostring(s[1])) put('blackout', tostring(s[2])) put('majority', tostring(s[3]))  -- else a reply cuts them
  put('calls', calls) put('failed', failed) put('ok', ok) put('row', row) put('seen_ms', now)
  if not b[3] then put('began_ms', now) end
  if ARGV[4]:find('[ob]') then put('ok_ms', now) end
  if usual and math.max(s[1], s[2]) < top / 2.5 then  -- while something is wrong, nobody learns what is usual
    local before = tonumber(b[12] or '0')
    local fades = before > 0 and math.exp(-math.max(0, now - before) / 1000 / tonumber(ARGV[9])) or 1
    put('base_calls', tostring(tonumber(b[10] or '0') * fades + ended))
    put('base_failed', tostring(math.max(0, tonumber(b[11] or '0') * fades + bad)))
    put('base_ms', math.max(now, before))
  end
  if ARGV[5] ~= '' then put('why', ARGV[5]) end
  redis.call('zadd', KEYS[2], now, ARGV[2])
  redis.call('pexpire', KEYS[2], 120000)
  if last == 'f' or last == 'l' then
    redis.call('zadd', KEYS[3], now, ARGV[2])
    redis.call('pexpire', KEYS[3], 120000)
    failing = redis.call('zcard', KEYS[3])
  elseif failing > 0 then
    failing = failing - redis.call('zrem', KEYS[3], ARGV[2])
  end
end
-- how long an answer took is a fact, whatever was thought of the route meanwhile
for field, n in ARGV[7]:gmatch('(%S+) (%d+)') do redis.call('hincrby', KEYS[4], field, n) end
if tonumber(ARGV[6]) > 0 then
  local until_ms = now + tonumber(ARGV[6])
  if until_ms > tonumber(b[13] or '0') then
    put('throttled_until_ms', until_ms)
    redis.call('hincrby', KEYS[1], 'version', 1)
    redis.call('publish', ARGV[8], ARGV[1])
  end
end
if #set > 0 then
  redis.call('hset', KEYS[1], unpack(set))
  if not b[3] then redis.call('sadd', KEYS[5], ARGV[1]) end
end
local known = ARGV[17] ~= '' and ARGV[17] == (b[14] or '0')
local row
if known then
  row = redis.call('hmget', KEYS[1], 'brownout', 'blackout', 'majority', 'calls', 'failed', 'ok', 'row', 'base_calls',
    'base_failed', 'base_ms', 'began_ms', 'ok_ms', 'seen_ms', 'throttled_until_ms', 'why')
else
  row = redis.call('hgetall', KEYS[1])
end
return {row, known and 0 or 1, redis.call('zcard', KEYS[2]), failing, now}

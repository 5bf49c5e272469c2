-- Counts calls of one breaker, those of its current generation only, and reads breaker and window.
-- KEYS: breaker (hash), window (hash), breakers (set)
-- ARGV: key of the breaker, generation of the calls ('' to read only), ok, failed, window (s), why (of a failure; '' none),
--       quiet asked for by the provider (ms; 0 none), news channel
-- Returns the breaker as a flat list, ok, failed, now (unix ms).
-- Not idempotent: calls reported again after a lost reply count twice, for as long as the window is.
local t = redis.call('time')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local second, keep = tonumber(t[1]), tonumber(ARGV[5])
redis.call('srem', KEYS[3], '')  -- nothing; but a full Redis lets a script write that began by taking away
redis.call('sadd', KEYS[3], ARGV[1])
local generation = redis.call('hget', KEYS[1], 'generation') or '0'
if ARGV[2] == generation then
  if tonumber(ARGV[3]) > 0 then redis.call('hincrby', KEYS[2], second .. ':o', ARGV[3]) end
  if tonumber(ARGV[4]) > 0 then redis.call('hincrby', KEYS[2], second .. ':f', ARGV[4]) end
  if ARGV[6] ~= '' then redis.call('hset', KEYS[1], 'why', ARGV[6]) end
end
if tonumber(ARGV[7]) > 0 then
  local until_ms = now + tonumber(ARGV[7])
  if until_ms > tonumber(redis.call('hget', KEYS[1], 'throttled_until_ms') or '0') then
    redis.call('hset', KEYS[1], 'throttled_until_ms', until_ms)
    redis.call('publish', ARGV[8], ARGV[1])
  end
end
redis.call('expire', KEYS[2], keep + 60)
local ok, failed = 0, 0
local window = redis.call('hgetall', KEYS[2])
for i = 1, #window, 2 do
  local at, kind = window[i]:match('^(%d+):(%a)$')
  if second - tonumber(at) >= keep then redis.call('hdel', KEYS[2], window[i])
  elseif kind == 'o' then ok = ok + window[i + 1]
  else failed = failed + window[i + 1] end
end
return {redis.call('hgetall', KEYS[1]), ok, failed, now}

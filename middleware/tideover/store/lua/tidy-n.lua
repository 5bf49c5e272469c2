-- Forgets what was noted of jobs that are no more, because a worker without tideover ended them.
-- KEYS: the notes (hash or set), then where the bodies of their jobs may be: msgs (hash) of one list or of several
-- ARGV: 'hash' or 'set' (the notes), then for each: its field, what it said when it was read ('' if that is all one), Redis id
-- Returns how many it forgot. Idempotent: a note of a job that has a body stays, as does one that says something else by now.
local n = 0
for i = 2, #ARGV, 3 do
  local field, said, alive = ARGV[i], ARGV[i + 1], false
  for j = 2, #KEYS do alive = alive or redis.call('hexists', KEYS[j], ARGV[i + 2]) == 1 end
  if not alive and ARGV[1] == 'set' then
    n = n + redis.call('srem', KEYS[1], field)
  elseif not alive and (said == '' or redis.call('hget', KEYS[1], field) == said) then
    n = n + redis.call('hdel', KEYS[1], field)
  end
end
return n

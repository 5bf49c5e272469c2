-- Accepts new jobs of one queue: their bodies, their places in the queue and their lines in the account, at once.
-- KEYS: msgs (hash), queue (list), account (hash), queues (set); and where a job has more to say: tenants (hash),
--       once today (hash), once yesterday (hash)
-- ARGV: queue name (without .DQ), most jobs of the namespace and of a tenant ('' no limits; else two numbers with a tab
--       between, -1: no limit), then for each job: Redis id, body, more ('' nothing; else with tabs between: tenant, key under
--       which it may be sent only once, what is remembered under that key)
-- Returns for each job (in a list, unless it is one job with nothing more to say) 1 accepted; 0 this very job is there
-- already; 2 another one has its id; 3 no room in the namespace; 4 no room for its tenant; or what was remembered when it was
-- sent before.
-- Idempotent: a script repeated after a lost reply finds its bodies and changes nothing.
if #ARGV == 5 and ARGV[2] == '' and ARGV[5] == '' then  -- one job with nothing more to say: what `send` does all day
  if redis.call('hsetnx', KEYS[1], ARGV[3], ARGV[4]) == 0 then
    return redis.call('hget', KEYS[1], ARGV[3]) == ARGV[4] and 0 or 2
  end
  redis.call('rpush', KEYS[2], ARGV[3])
  redis.call('hincrby', KEYS[3], 'accepted', 1)
  redis.call('sadd', KEYS[4], ARGV[1])
  return 1
end
local most, most_of_tenant, alive, out, ids = -1, -1, 0, {}, {}
if ARGV[2] ~= '' then
  local a, b = ARGV[2]:match('^(.*)\t(.*)$')
  most, most_of_tenant = tonumber(a), tonumber(b)
end
if most >= 0 then
  local ends = {'succeeded', 'failed', 'expired', 'discarded', 'unexplained', 'elsewhere'}
  local sums = redis.call('hmget', KEYS[3], 'accepted', unpack(ends))
  alive = tonumber(sums[1] or '0')
  for i = 2, #sums do alive = alive - tonumber(sums[i] or '0') end
end
for i = 3, #ARGV, 3 do
  local id, body, tenant, once, kept = ARGV[i], ARGV[i + 1], '', '', ''
  if ARGV[i + 2] ~= '' then tenant, once, kept = ARGV[i + 2]:match('^([^\t]*)\t([^\t]*)\t(.*)$') end
  local first = once ~= '' and (redis.call('hget', KEYS[6], once) or redis.call('hget', KEYS[7], once))
  local known = redis.call('hget', KEYS[1], id)
  if known == body then out[#out + 1] = 0
  elseif first then out[#out + 1] = first
  elseif known then  -- sent again after its key was forgotten, while the job still lives; or another message of this id
    out[#out + 1] = once ~= '' and not kept:find('\t-', 1, true) and kept or 2
  elseif most >= 0 and alive >= most then out[#out + 1] = 3
  elseif tenant ~= '' and most_of_tenant >= 0 and tonumber(redis.call('hget', KEYS[5], tenant) or '0') >= most_of_tenant then
    out[#out + 1] = 4
  else
    redis.call('hset', KEYS[1], id, body)
    ids[#ids + 1], alive, out[#out + 1] = id, alive + 1, 1
    if tenant ~= '' then redis.call('hincrby', KEYS[5], tenant, 1) end
    if once ~= '' then
      redis.call('hset', KEYS[6], once, kept)
      redis.call('expire', KEYS[6], 172800)  -- two days: it is looked for today and tomorrow
    end
  end
end
if #ids > 0 then
  redis.call('rpush', KEYS[2], unpack(ids))
  redis.call('hincrby', KEYS[3], 'accepted', #ids)
  redis.call('sadd', KEYS[4], ARGV[1])
end
return out

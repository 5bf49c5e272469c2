-- Accepts new jobs of one queue: their bodies, their places in the queue and their lines in the account, at once.
-- KEYS: msgs (hash), queue (list), account (hash), queues (set), tenants (hash), once today (hash), once yesterday (hash)
-- ARGV: queue name (without .DQ), list name, most jobs of the namespace and of a tenant (-1: no limit), lifetime of "once" (s),
--       then for each job: Redis id, body, tenant ('' none), key under which it may be sent only once ('' none), digest
-- Returns for each job 1 accepted; 0 this very job is there already; 2 another one has its id; 3 no room in the namespace; 4 no
-- room for its tenant; or the list and digest under which it was sent before.
-- Idempotent: a script repeated after a lost reply finds its bodies and changes nothing.
local most, most_of_tenant, out, ids = tonumber(ARGV[3]), tonumber(ARGV[4]), {}, {}
local alive = 0
if most >= 0 then
  local ends = {'succeeded', 'failed', 'expired', 'discarded', 'unexplained', 'elsewhere'}
  local sums = redis.call('hmget', KEYS[3], 'accepted', unpack(ends))
  alive = tonumber(sums[1] or '0')
  for i = 2, #sums do alive = alive - tonumber(sums[i] or '0') end
end
for i = 6, #ARGV, 5 do
  local id, body, tenant, once = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local first = once ~= '' and (redis.call('hget', KEYS[6], once) or redis.call('hget', KEYS[7], once))
  local known = redis.call('hget', KEYS[1], id)
  if known == body then out[#out + 1] = 0
  elseif first then out[#out + 1] = first
  elseif known then out[#out + 1] = 2
  elseif most >= 0 and alive >= most then out[#out + 1] = 3
  elseif tenant ~= '' and most_of_tenant >= 0 and tonumber(redis.call('hget', KEYS[5], tenant) or '0') >= most_of_tenant then
    out[#out + 1] = 4
  else
    redis.call('hset', KEYS[1], id, body)
    ids[#ids + 1], alive, out[#out + 1] = id, alive + 1, 1
    if tenant ~= '' then redis.call('hincrby', KEYS[5], tenant, 1) end
    if once ~= '' then
      redis.call('hset', KEYS[6], once, ARGV[2] .. '\t' .. ARGV[i + 4])
      redis.call('expire', KEYS[6], ARGV[5])
    end
  end
end
if #ids > 0 then
  redis.call('rpush', KEYS[2], unpack(ids))
  redis.call('hincrby', KEYS[3], 'accepted', #ids)
  redis.call('sadd', KEYS[4], ARGV[1])
end
return out

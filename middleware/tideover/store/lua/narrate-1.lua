-- Adds lines to stories of jobs; a long story keeps its first line and its latest, each of them whole.
-- KEYS: stories of the day (hash)
-- ARGV: lifetime (s), longest story (bytes), most stories, then for each line: job id, line
-- Returns the number of lines. Once there are so many stories no new one begins.
-- Not idempotent: a repetition tells a line twice, which misleads nobody.
local longest, room = tonumber(ARGV[2]), tonumber(ARGV[3]) - redis.call('hlen', KEYS[1])
for i = 4, #ARGV, 2 do
  local known = redis.call('hget', KEYS[1], ARGV[i])
  local story = known and (known .. '\n' .. ARGV[i + 1]) or ARGV[i + 1]
  local first, later = story:match('^([^\n]*\n)(.+)$')
  if first and #story > longest then
    local latest = later:sub(-math.floor(longest / 2)):match('\n(.*)$')
    story = first .. (latest or later:match('[^\n]*$'))
  end
  if known or room > 0 then redis.call('hset', KEYS[1], ARGV[i], story) end
  if not known then room = room - 1 end
end
redis.call('expire', KEYS[1], ARGV[1])
return (#ARGV - 3) / 2

-- Adds lines to stories of jobs; a long story keeps its first line and its latest, each of them whole.
-- KEYS: stories of the day (hash)
-- ARGV: lifetime (s), longest story (bytes), then for each line: job id, line
-- Returns the number of lines. Not idempotent: a repetition tells a line twice, which misleads nobody.
local longest = tonumber(ARGV[2])
for i = 3, #ARGV, 2 do
  local story = redis.call('hget', KEYS[1], ARGV[i])
  story = story and (story .. '\n' .. ARGV[i + 1]) or ARGV[i + 1]
  local first, later = story:match('^([^\n]*\n)(.+)$')
  if first and #story > longest then
    local latest = later:sub(-math.floor(longest / 2)):match('\n(.*)$')
    story = first .. (latest or later:match('[^\n]*$'))
  end
  redis.call('hset', KEYS[1], ARGV[i], story)
end
redis.call('expire', KEYS[1], ARGV[1])
return (#ARGV - 2) / 2

-- Adds lines to stories of jobs; a story keeps its first and its latest lines.
-- KEYS: stories of the day (hash)
-- ARGV: lifetime (s), longest story (bytes), then for each line: job id, line
-- Returns the number of lines.
for i = 3, #ARGV, 2 do
  local story = redis.call('hget', KEYS[1], ARGV[i])
  story = story and (story .. '\n' .. ARGV[i + 1]) or ARGV[i + 1]
  if #story > tonumber(ARGV[2]) then
    local first = story:match('^[^\n]*\n')
    story = first .. story:sub(-math.floor(tonumber(ARGV[2]) / 2)):gsub('^[^\n]*\n', '', 1)
  end
  redis.call('hset', KEYS[1], ARGV[i], story)
end
redis.call('expire', KEYS[1], ARGV[1])
return (#ARGV - 2) / 2
